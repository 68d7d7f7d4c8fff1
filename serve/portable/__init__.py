"""A trained classifier without torch: bytes of an image file → classes with probabilities.

NumPy and Pillow (and onnxruntime, in `onnx_classifier`) are all that it needs. The folder is also copied as
it is into other places (a Space, a container, an MLflow model), so it imports nothing of the rest of the
project, and its own modules relatively.

Example:
    >>> from serve.portable.onnx_classifier import OnnxClassifier
    >>> classifier = OnnxClassifier(Path("exported/mine"))
    >>> classifier.classify([Path("photo.jpg").read_bytes()])[0].names[0]
    'glacier'
"""
