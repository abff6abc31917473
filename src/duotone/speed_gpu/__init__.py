"""`duotone bench gpu`: everything that only a GPU can tell, in one command and a given time."""
