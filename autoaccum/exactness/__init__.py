"""Test whether accumulated gradients equal the large batch's."""
