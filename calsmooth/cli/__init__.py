"""The command line: one thin file a command, options -> config -> call -> render."""
