"""How time and memory of certify and solve_head grow with the number of samples."""
