"""Images decoded once, to be read at memory speed."""
