"""Turn a plan into other tools' configuration. No torch."""
