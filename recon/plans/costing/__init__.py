"""What a plan costs: parameters, multiply-adds and memory, counted on the traced network."""
