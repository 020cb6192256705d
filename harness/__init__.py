"""A benchmark and ablation harness for Chatterbox TTS inference optimizations."""
