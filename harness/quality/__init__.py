"""What became of the words and of the voice: recognizers, speaker models, and the scores made with them."""
