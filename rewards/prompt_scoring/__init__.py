"""What a prompt is worth: the score of a frozen model that it makes solve a task."""
