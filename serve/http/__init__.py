"""A small production endpoint: POST an image, get its classes.

    python -m serve http exported/mine --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

FastAPI and uvicorn around `serve.portable`: no torch, and nothing else of this project.

    a connection (protocol.py: deadlines, number, broken HTTP)
      → guard.py: key, sizes, one log line, metrics, polite ends
        → app.py: routes → bodies.py, multipart.py: bytes, bounded → batching.py: decode, batch, compute
"""
