"""What a model is made of: its head, its wide layer, which operators are analytic; freezing and widening."""
