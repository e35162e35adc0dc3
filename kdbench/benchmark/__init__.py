"""The plan of an experiment: teacher, searches and finals as units of work with a key each, done in order, each once."""
