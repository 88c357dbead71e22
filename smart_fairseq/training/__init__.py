"""What training needs of the plugin: a base for criteria, their flags, checks, metrics, the optimizer's link."""
