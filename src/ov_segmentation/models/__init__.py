"""The methods, one folder each. They share blocks through `layers/`, never by importing one another."""
