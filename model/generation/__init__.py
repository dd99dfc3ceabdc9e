"""Generation with a cache of keys and values, at any tensor x pipeline layout."""
