"""Code that calls the compiler, malloc, OpenMP and oneDNN, and that measures memory."""
