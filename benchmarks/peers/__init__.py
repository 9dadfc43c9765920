"""Other batch size finders: the real packages, each called as its documentation says."""
