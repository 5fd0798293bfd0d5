"""AAND: reverse distillation from a teacher whose anomalies are amplified."""
