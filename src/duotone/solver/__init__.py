"""Mathematics on tensors: scales, statistics, orders, the solver and the methods. Knows no model class and no file."""
