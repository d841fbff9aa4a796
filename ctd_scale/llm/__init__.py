"""A causal LM reads titles and continuous tokens and says what the user wants."""
