"""Reports as text: their sections, the findings that they state, and the files that they can be saved as."""
