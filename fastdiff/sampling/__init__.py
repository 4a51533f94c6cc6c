"""Drawing images: settings, jobs over many processes, files and grids."""
