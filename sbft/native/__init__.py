"""What talks to compilers, to malloc and to oneDNN, and what measures memory."""
