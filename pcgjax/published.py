"""Every figure that a paper prints and that ours stand beside."""

from __future__ import annotations

# Its tables 1 and 2, as printed: CA, Sens, Spec, AUC.
PAPER = {
    "unbalanced": {
        "knn": (0.8625, 0.95, 0.60, 0.855), "svm": (0.8375, 0.9833, 0.40, 0.4367),
        "mlp": (0.8375, 0.9833, 0.40, 0.645), "logistic": (0.875, 1.0, 0.40, 0.4367),
    },
    "balanced": {
        "knn": (0.7679, 0.8947, 0.63, 0.7833), "svm": (0.62, 0.8167, 0.63, 0.5083),
        "mlp": (0.7225, 0.9333, 0.45, 0.8917), "logistic": (0.6825, 0.9333, 0.45, 0.675),
    },
}  # fmt: skip
PAPER_NOTE = (
    "The paper prints 100 normal and 166 murmur clips, best of ten runs. Its unbalanced test sets are 80 clips: 0.9833 "
    "is 59 of 60, 0.95 is 57 of 60, 0.60 is 12 of 20, 0.40 is 8 of 20, and 59 + 8 and 57 + 12 of 80 are its 0.8375 and "
    "0.8625. So 60 clips were of the class that it calls positive and 20 of the other: three tenths of 200 and of 66, "
    "which are the counts of clean normal and murmur clips in the published set. Its “Sens” is the share of normal "
    "clips found and its “Spec” that of murmurs; here murmur is positive, and the paper's two numbers are set "
    "accordingly. (Logistic regression: 60 + 8 of 80 would be 0.85, it prints 0.875.) Always answering “normal” "
    "gets 0.75 on such a test set. The balanced table's fractions fit no one test set."
)
# The CNN paper's Table 1 (Lamperti). 301 recordings are the size of the Challenge's `validation` folder, whose files
# are copies of training recordings.
CNN_PAPER = {
    "source": "Lamperti, Binary Classification of Heart Sounds Using a 1D CNN, Table 1",
    "note": "The paper judged 301 recordings (150 normal, 151 abnormal). That is the size of the Challenge's "
    "validation folder, whose files are byte-identical copies of training recordings: its numbers are "
    "probably contaminated and say little about people whom the model never heard.",
    "results": {"Filter": {"accuracy": 0.9734, "auc": 0.9993, "precision": 1.0, "recall": 0.9470, "f1": 0.9728}},
}
PAPER_METRICS = ("accuracy", "auc", "precision", "recall", "f1")
# config -> (system, the paper's tables I to III)
HINF_PAPER: dict[str, tuple[str, tuple[float, ...]]] = {
    "hinf_lstm": ("CNN-H∞-LSTM with SAPT", (0.9885, 0.9942, 0.9923, 0.9949)),
    "hinf_lstm/cnn_lstm": ("CNN-LSTM with SAPT", (0.9619, 0.9816, 0.9469, 0.9929)),
    "resnet50": ("ResNet-50", (0.8968, 0.8894, 0.9383, 0.8382)),
    "mobilenet_v3": ("MobileNetV3-Large", (0.8136, 0.8127, 0.7901, 0.8382)),
    "vit": ("Vision transformer", (0.8423, 0.9523, 0.8997, 0.9608)),
    "wav2vec2": ("Wav2Vec2", (0.6954, 0.6814, 0.6326, 0.6324)),
    "hubert": ("HuBERT", (0.7121, 0.7121, 0.7185, 0.7058)),
    "distilhubert": ("DistilHuBERT", (0.7445, 0.7823, 0.7247, 0.7654)),
}
# "Exploring Finetuned Audio-LLM on Heart Murmur Features", Tables 1 to 3: {task, or data set/score: (without
# segmentation, with it, what the paper quotes of others)}.
AUDIO_LLM_PAPER: dict[str, tuple[float | None, float | None, float | None]] = {
    "systolic_timing": (1.0, 1.0, 0.966), "systolic_shape": (0.997, 1.0, 0.963),
    "systolic_grading": (0.334, 0.334, 0.966), "systolic_pitch": (0.997, 1.0, 0.966),
    "systolic_quality": (0.992, 1.0, 0.965),
    "diastolic_timing": (1.0, 1.0, None), "diastolic_shape": (0.999, 1.0, None),
    "diastolic_grading": (0.395, 0.427, None), "diastolic_pitch": (1.0, 1.0, None),
    "diastolic_quality": (1.0, 1.0, None),
    "weighted_accuracy": (0.637, 0.756, 0.832),
    "cinc2016/accuracy": (0.1963, 0.6633, None),
    "pascal-a/precision_normal": (0.487, 0.483, None), "pascal-a/precision_abnormal": (0.0, 1.0, None),
    "pascal-b/precision_normal": (0.737, 0.753, None), "pascal-b/precision_abnormal": (0.40, 0.625, None),
}  # fmt: skip
