"""Reading float models: directories, hub ids and modules, tensor by tensor, all of it input that is not trusted."""
