"""What is drawn: HTML pages and their figures."""
