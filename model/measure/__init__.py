"""What can be told of a finished clip without any model: sound against picture, quality of both, energy spent."""
