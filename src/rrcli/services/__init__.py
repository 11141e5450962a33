"""One file per command. A service takes settings and a reporter, returns a result, and neither prints nor exits."""
