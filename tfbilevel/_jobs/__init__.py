"""Jobs in one call: estimators on arrays, with the habits of Keras and scikit-learn."""
