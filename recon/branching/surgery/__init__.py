"""How a branched copy of a model is made, once."""
