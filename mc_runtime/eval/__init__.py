"""What the memory keeps, held against a floor, a ceiling and rivals at equal slots."""
