"""The formulas in plain torch: the definition of right for every backend."""
