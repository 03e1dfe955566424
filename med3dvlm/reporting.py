"""The import path of earlier versions, kept for them: use `med3dvlm.reports.draft`."""

from med3dvlm.reports.draft import read_report, report_dicom, report_json, report_markdown, report_text, report_zip

__all__ = ["read_report", "report_dicom", "report_json", "report_markdown", "report_text", "report_zip"]
