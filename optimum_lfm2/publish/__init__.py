"""The folder for the Hub: every precision, what each runtime has to know, and a model card."""
