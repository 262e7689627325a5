"""Before a run starts, it is estimated what the run will take."""
