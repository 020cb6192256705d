"""T3's decode step in C++ for a CPU: the source, its compilation, and the engine that calls it."""
