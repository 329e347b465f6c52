"""Labs and their graders."""
