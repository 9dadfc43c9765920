"""Other batch size finders: the real packages, called as documented."""
