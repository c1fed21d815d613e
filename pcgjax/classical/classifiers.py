"""The four scikit-learn classifiers of the classical chain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from pcgjax.data import splits


def make_classifier(name: str, config: ml_collections.ConfigDict, seed: int) -> Any:
    """A scikit-learn pipeline: every attribute to [0, 1] by its range in training, then the classifier.

    Not published, and so as in Orange 2, which the paper used, or scikit-learn's default: the SVM's degree and C, the
    MLP's sigmoids and L-BFGS.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler
    from sklearn.svm import SVC

    m = config.model
    if name == "knn":
        classifier: Any = KNeighborsClassifier(m.neighbours)
    elif name == "svm":
        classifier = SVC(kernel="poly", degree=m.svm_degree, tol=m.svm_tolerance)
    elif name == "mlp":
        classifier = MLPClassifier(
            (m.hidden,), activation="logistic", solver="lbfgs", alpha=m.mlp_regularisation,
            max_iter=config.train.epochs, random_state=seed,
        )  # fmt: skip
    else:
        classifier = LogisticRegression(C=m.logistic_c, max_iter=5000)
    return make_pipeline(MinMaxScaler(), classifier)


def fit(name: str, config: ml_collections.ConfigDict, seed: int, x: np.ndarray, y: np.ndarray) -> Callable:
    """A fitted classifier as a function: (n, attributes) -> (n,) probabilities of class 1.

    The SVM's is the logistic function of its margin: right in order and at 0.5, but not calibrated.
    Raises:
      SplitError: fewer recordings of a class than kNN has neighbours to look at.
    """
    import scipy.special
    import sklearn.exceptions
    import threadpoolctl

    counts = np.bincount(np.asarray(y, int), minlength=2)
    if counts.min() < 1 or len(y) < config.model.neighbours:
        raise splits.SplitError(
            f"{counts[0]} and {counts[1]} recordings of the two classes to fit to: too few for "
            f"model.neighbours={config.model.neighbours}; use more data or other fractions"
        )
    # A product here takes less than waking a second thread.
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
        # The paper's limit of iterations, and small ones of a config, are meant to be reached.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        model = make_classifier(name, config, seed).fit(x, y)
    if name == "svm":
        return lambda x: scipy.special.expit(model.decision_function(x))
    return lambda x: model.predict_proba(x)[:, 1]
