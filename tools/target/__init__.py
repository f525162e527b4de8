"""The quickstart's target model: from a package to a Hugging Face directory."""
