"""Float models are read from directories, the hub and modules, tensor by tensor; nothing in them is trusted."""
