"""The miniature checkpoint: Chatterbox's own classes at small sizes, taught to speak from scratch."""
