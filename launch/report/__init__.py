"""`orthant report`: one run as one page that needs nothing but itself."""
