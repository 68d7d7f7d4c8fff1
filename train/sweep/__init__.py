"""Search for the best values of recipe keys with Optuna: every trial is a training as a user would start it.

python -m train.sweep configs/demo.yaml --trials 20 data.path=data/intel optimizer.peak_lr=log:0.01..1

Optuna is optional (`pip install optuna`) and imported only in this package.
"""
