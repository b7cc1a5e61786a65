//! Downloads: bounded in size, never waiting for ever, and unable to be led from a protected server to another.

use super::error::InstallError;
use super::source::{find_sha256, is_allowed, is_loopback, shown};
use super::staged::hex;
use super::{CHECKSUM_SUFFIX, Limits, MAX_CHECKSUM_FILE_BYTES};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, Url};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

const MAX_REDIRECTS: usize = 10;

/// Fetches from one server.
pub(super) struct Downloader<'a> {
    client: Client,
    limits: &'a Limits,
}

impl<'a> Downloader<'a> {
    /// For `url`, the content of which is known beforehand if `has_sha256`.
    pub(super) fn new(
        url: &Url,
        has_sha256: bool,
        limits: &'a Limits,
    ) -> Result<Self, InstallError> {
        // An error says that one was installed before, which is just as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .user_agent(concat!("banger/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(limits.connect)
            .redirect(Policy::custom(move |attempt| {
                if attempt.previous().len() > MAX_REDIRECTS {
                    attempt.error(RedirectError::TooMany)
                } else if is_allowed(attempt.url(), has_sha256) {
                    attempt.follow()
                } else {
                    let to = shown(attempt.url());
                    attempt.error(RedirectError::Unprotected { to })
                }
            }));
        if is_loopback(url) {
            builder = builder.no_proxy();
        }
        Ok(Self {
            client: builder.build().map_err(InstallError::Client)?,
            limits,
        })
    }

    async fn in_time<T>(
        &self,
        url: &Url,
        limit: Duration,
        work: impl Future<Output = Result<T, reqwest::Error>>,
    ) -> Result<T, InstallError> {
        match timeout(limit, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(source)) => Err(InstallError::Download {
                url: shown(url),
                source: source.without_url(),
            }),
            Err(_) => Err(InstallError::Stalled {
                url: shown(url),
                limit,
            }),
        }
    }

    async fn get(&self, url: &Url, limit: u64) -> Result<Response, InstallError> {
        let asked = self.client.get(url.clone()).send();
        let response = self
            .in_time(url, self.limits.connect + self.limits.stall, asked)
            .await?;
        if !response.status().is_success() {
            return Err(InstallError::Status {
                url: shown(url),
                status: response.status(),
            });
        }
        if response
            .content_length()
            .is_some_and(|length| length > limit)
        {
            return Err(InstallError::TooLarge {
                what: shown(url),
                limit,
            });
        }
        Ok(response)
    }

    /// Downloads into `file`; gives the SHA-256. `told` hears how many bytes have come, and of how many.
    pub(super) async fn archive(
        &self,
        url: &Url,
        file: File,
        path: &Path,
        mut told: impl FnMut(u64, Option<u64>),
    ) -> Result<String, InstallError> {
        let mut response = self.get(url, self.limits.archive).await?;
        let total = response.content_length();
        let mut file = tokio::fs::File::from_std(file);
        let mut hasher = Sha256::new();
        let mut come = 0;
        told(come, total);
        while let Some(chunk) = self
            .in_time(url, self.limits.stall, response.chunk())
            .await?
        {
            come += chunk.len() as u64;
            if come > self.limits.archive {
                return Err(InstallError::TooLarge {
                    what: shown(url),
                    limit: self.limits.archive,
                });
            }
            hasher.update(&chunk);
            file.write_all(&chunk)
                .await
                .map_err(InstallError::io("write", path))?;
            told(come, total);
        }
        file.flush()
            .await
            .map_err(InstallError::io("write", path))?;
        Ok(hex(&hasher.finalize()))
    }

    /// The SHA-256 that the release's own checksum file gives for the archive at `url`.
    pub(super) async fn checksum(&self, url: &Url) -> Result<String, InstallError> {
        let archive = url.path().rsplit('/').next().unwrap_or_default().to_owned();
        let mut beside = url.clone();
        beside.set_path(&format!("{}{CHECKSUM_SUFFIX}", url.path()));
        let mut response = self.get(&beside, MAX_CHECKSUM_FILE_BYTES).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = self
            .in_time(&beside, self.limits.stall, response.chunk())
            .await?
        {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > MAX_CHECKSUM_FILE_BYTES {
                return Err(InstallError::TooLarge {
                    what: shown(&beside),
                    limit: MAX_CHECKSUM_FILE_BYTES,
                });
            }
        }
        find_sha256(&String::from_utf8_lossy(&bytes), &archive).ok_or_else(|| {
            InstallError::BadChecksumFile {
                name: shown(&beside),
                subject: archive,
            }
        })
    }
}

/// Why a redirect is not followed.
#[derive(Debug, thiserror::Error)]
enum RedirectError {
    #[error("the server redirects in circles")]
    TooMany,
    #[error("the server redirects to `{to}`, which protects nothing on the way")]
    Unprotected { to: String },
}
