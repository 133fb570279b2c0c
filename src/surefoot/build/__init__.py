"""Config -> objects, the only room that knows every class."""
