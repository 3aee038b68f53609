"""Atlas, the embedded world: country outlines to look at, facts to look up, questions about both."""
