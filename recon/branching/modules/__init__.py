"""The modules that a branched model is made of."""
