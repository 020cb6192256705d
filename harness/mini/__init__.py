"""The miniature checkpoint: Chatterbox's own classes at small sizes, and weights that speak. `training` made them."""
