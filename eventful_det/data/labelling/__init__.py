"""What pictures are labelled with, and by whom."""
