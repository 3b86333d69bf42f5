"""`ltx-ray doctor`: whether a node has what a run needs, before one finds out."""
