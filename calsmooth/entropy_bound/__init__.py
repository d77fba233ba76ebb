"""entropy_bound"""
