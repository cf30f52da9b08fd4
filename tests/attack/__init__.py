"""A hostile tenant at its worst beside a neighbour with a light load, who is to notice nothing."""
